"""GraphSurgeon passes: load, fold, place, rewrite."""
