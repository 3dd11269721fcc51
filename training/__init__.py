"""Scripts that train, export and check QuickSilver's reference models; not part of the installed package."""
