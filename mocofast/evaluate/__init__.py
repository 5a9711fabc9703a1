"""How good a representation is: k nearest neighbours, few labels, and a linear probe, all on frozen features."""
