"""Running graphs over rows, in floating point and with Q/DQ, and how alike their outputs are."""
