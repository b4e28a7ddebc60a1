"""What an engine with a placement costs, in microseconds: measured, imported, or modelled."""
