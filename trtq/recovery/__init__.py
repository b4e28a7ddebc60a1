"""Recovering accuracy: what is done when calibration alone is not within the target (paper section 5)."""
