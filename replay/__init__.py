"""Historical logs and simulations → the stream that N meters would send."""
