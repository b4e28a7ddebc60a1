"""The way from calibration tables to explicit models, and back."""
