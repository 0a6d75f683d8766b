"""The public code's words around a question, where its answers end, and its budget."""

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
STOP = ("Instruction:", "Instruction", "Response:", "Response")
MAX_NEW_TOKENS = 512  # 1024 for MATH
