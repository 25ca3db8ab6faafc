"""Declared problems: Learning by Teaching and what it needs. They import only public modules of mlo."""
