"""How large the tiny models of the tests are."""

HIDDEN, MLP, LAYERS, HEADS, CONTEXT = 32, 48, 3, 4, 128
