"""Stand-in for SGLang's compiled kernels on a machine without a GPU (see `requirements/sglang-cpu.txt`).

SGLang imports these names on CPU at start, whether or not a served model needs them. What a plain causal
language model runs calls none of them; one that is called says so, instead of answering wrongly.
"""

from __future__ import annotations

from typing import NoReturn

__version__ = "0.0.0+standin"


def _missing(name: str) -> object:
    def kernel(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but the stand-in for machines without a GPU has no kernels: "
            "this model or option needs SGLang's own build of sgl-kernel"
        )

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


copy_all_layer_kv_cache_cpu = _missing("copy_all_layer_kv_cache_cpu")
assign_req_to_token_pool_cpu = _missing("assign_req_to_token_pool_cpu")
assign_extend_cache_locs_cpu = _missing("assign_extend_cache_locs_cpu")
assign_draft_cache_locs_contiguous_cpu = _missing("assign_draft_cache_locs_contiguous_cpu")
fill_accept_out_cache_loc_cpu = _missing("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _missing("fill_bonus_tokens_cpu")
build_tree_kernel_efficient_cpu = _missing("build_tree_kernel_efficient_cpu")
verify_tree_greedy_cpu = _missing("verify_tree_greedy_cpu")
