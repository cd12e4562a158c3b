"""BasicSR models: how networks are trained."""
