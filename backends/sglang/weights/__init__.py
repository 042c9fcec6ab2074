"""How new weights reach SGLang: by which carrier, and what is checked before."""
