"""Scripts that measure QuickSilver beside other engines; not part of the installed package, and never run by tests."""
