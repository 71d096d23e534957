"""Growth masks, which hide new units of a grown model and fade them in.

The masks of MSG (Yao et al., arXiv 2305.02869) are 1 on old units and v on new ones. Each path through a new unit is
masked once (`sites`), so that what it computes and all gradients of its weights go with v: at v = 0 there are none.
They are put on a built model and taken off when v reaches 1: from then on the modules run exactly as without masks.
`earlier` has the places of growths that began before each path was masked once, which go on as they began.
"""

from flm_megatron.model.masks.growth_masks import GrowthMasks

__all__ = ["GrowthMasks"]
