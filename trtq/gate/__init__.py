"""The accuracy gate: candidate against fp32, as statistics."""
