"""What a crash may leave of the files of an operation: recorders, a file system, its crash states and checks of them.

An operation is recorded as the list of its changes to files (`events`), either inside this process
(`python_recorder`) or from the system calls of a command with all its processes (`strace_recorder`). `file_system`
plays them back and knows what the disk is bound to hold at each moment; `states` enumerates what it may hold.
"""
