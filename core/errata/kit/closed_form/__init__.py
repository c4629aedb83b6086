"""What the methods that write keys and values by least squares share (MEMIT and its kin).

* `config`: their hyper-parameters, and `statistics` what these mean for a model: layers, C.
* `target_values`: MEMIT's loss, and z = h + δ.
* `layer_updates`: keys and residuals from layer to layer.
* `matrices`: K, C, P and their inverses, so that a formula is a line of code.
* `deltas`: how the change is stored.
"""
