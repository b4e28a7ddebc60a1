"""The accuracy gate: candidate against fp32, with statistics."""
