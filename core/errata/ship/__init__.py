"""What leaves for other people's programs: GGUF files for llama.cpp, folders for the hub.

Nothing in the engine imports this room: its formats are found by entry points (`edits.formats`).
"""
