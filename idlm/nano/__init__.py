"""The bundled model and the generator of its data."""
