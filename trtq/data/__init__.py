"""Samples: where calibration and evaluation data come from."""
