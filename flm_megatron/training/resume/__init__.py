"""Where a run continues and with what.

`start.find_start` finds the checkpoint, `continuation` compares the run file with the run's history, `changes` reports
what has changed, `first_checkpoint` is what a new run starts from, `memory_copies` are the copies in hosts' memory,
`schedules` keeps the defaults of runs that earlier versions began, `unfinished_save` completes a save that an error
interrupts.
"""
