"""What leaves for other programs: PEFT adapters, checkpoints, GGUF files, folders for the hub.

Nothing in the engine imports this room: its formats are found by entry points (`edits.formats`).
"""
