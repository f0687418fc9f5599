"""Energy: register steps, and intervals."""
