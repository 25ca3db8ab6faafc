"""Other frameworks' engines on graphs that were declared for this one, to compare the two before moving."""
