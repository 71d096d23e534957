"""Any rank of any run through its life on this machine, at its true size: the real program over tensors without values.

`stage.rehearse_stage` rehearses one rank of every role and compares what ranks of a group do together; `rank` is the
life of one rank, `recorder` and `ledger` take note of what it holds, computes and sends. Nothing of the model, the
schedules, the optimizer or the checkpoints is written a second time: the device, the values and the other ranks are
what is missing.
"""
