"""PBS attention for the prefill of long prompts in vLLM, as a plugin of the group
`vllm.general_plugins`.

    vllm serve MODEL --attention-backend CUSTOM

`route` is the only file that decides which layers and which rows of a batch take PBS. All other
layers and rows use the attention backend of vLLM from which our classes derive.
"""

from .register import register

__all__ = ["register"]
