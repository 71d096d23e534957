"""Between a checkpoint and a model under tensor, pipeline and data parallelism.

`model_state.load_state` fills a model and its optimizer, `save_state` writes them, each rank what it holds. `placement`
says where a rank's parameters are in the logical tensors, `optimizer_state` the same for a distributed optimizer's flat
ranges, `layout` gives the regions of any layout from the configuration alone.
"""
