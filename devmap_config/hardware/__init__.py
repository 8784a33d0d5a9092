"""Hardware: the catalogue of accelerators and the inventory of a described machine."""
