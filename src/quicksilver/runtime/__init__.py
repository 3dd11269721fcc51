"""The engine: the layer loop over ragged batches, and transformers' interface in front of it."""
