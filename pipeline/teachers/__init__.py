"""Teachers: built-in models and adapters to foreign potentials, behind one interface."""
