"""Where tables live, and what several jobs share: session, decoding, publishing, state by batch, the pure engines."""
