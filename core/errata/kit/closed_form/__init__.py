"""What the methods that write keys and values by least squares share (MEMIT and its kin).

`config` their hyper-parameters, `walk` the way from layer to layer, `statistics` what belongs to
the base, `deltas` how what was found is stored. The solve itself is `errata.kit.solve`.
"""
