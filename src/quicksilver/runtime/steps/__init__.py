"""Steps between layers: each applies one kind of decision to the tokens that run on."""
