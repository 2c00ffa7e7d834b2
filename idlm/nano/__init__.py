"""The bundled model, its word problems and its evaluation."""
