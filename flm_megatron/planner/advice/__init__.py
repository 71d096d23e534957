"""Whether, when, from what size and by which operator to grow, from loss laws and measured token credit."""
