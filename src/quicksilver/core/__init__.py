"""Values that flow through the runtime: plans, layouts, decisions, traces. No modules, no models."""
