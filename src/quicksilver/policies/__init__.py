"""Pure functions from what a layer did to what should happen next; they touch no module and no cache."""
