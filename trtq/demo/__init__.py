"""The bundled model and data of `trtq demo`."""
