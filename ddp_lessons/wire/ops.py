"""The names of calls and groups in spans: torch.distributed's functions, and DDP's own calls.

Ranks record spans under these names; the parent finds and explains them by the same names.
"""

# The public functions, each with the parameter whose bytes are recorded as one rank's piece.
COLLECTIVES = {
    "all_gather": "tensor",
    "all_gather_coalesced": "input_tensor_list",
    "all_gather_into_tensor": "input_tensor",
    "all_gather_object": "",
    "all_gather_single": "input_tensor",
    "all_reduce": "tensor",
    "all_reduce_coalesced": "tensors",
    "all_to_all": "input_tensor_list",
    "all_to_all_single": "input",
    "barrier": "",
    "broadcast": "tensor",
    "broadcast_object_list": "",
    "gather": "tensor",
    "gather_into_tensor": "tensor",
    "gather_object": "",
    "gather_single": "tensor",
    "monitored_barrier": "",
    "reduce": "tensor",
    "reduce_scatter": "output",
    "reduce_scatter_single": "output",
    "reduce_scatter_tensor": "output",
    "scatter": "tensor",
    "scatter_object_list": "",
}
SENDS = {"send": "tensor", "isend": "tensor", "send_object_list": ""}
RECVS = {"recv": "tensor", "irecv": "tensor", "recv_object_list": ""}
PAIRWISE = {*SENDS, *RECVS}
ISSUED = ("irecv", "isend")  # they return before the work is done

# The parameter with the tensors that a call fills, one for each rank.
OUTPUTS = {
    "all_gather": "tensor_list",
    "all_gather_coalesced": "output_tensor_lists",
    "all_to_all": "output_tensor_list",
    "gather": "gather_list",
}

# The root sends to all other ranks, or receives from them.
FROM_ROOT = ("broadcast", "broadcast_object_list", "scatter", "scatter_object_list")
TO_ROOT = ("gather", "gather_into_tensor", "gather_object", "gather_single", "reduce")

# All ranks must pass equally many elements of the same type, or the call fails or mixes them up.
LIKE = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast",
    "gather", "gather_into_tensor", "gather_single", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_tensor",
)  # fmt: skip

# Calls that send the same as another one. Other pairs, such as those of reduce_scatter, do not.
SENDS_ALIKE = {"all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather"}

# DIRECT: each rank exchanges data with the root only. BY_TREE: ranks pass the root's data on.
DIRECT = ("gather", "gather_into_tensor", "gather_single", "scatter")
BY_TREE = ("broadcast", "broadcast_object_list", "scatter_object_list")

MAKES_GROUP = ("new_group", "split_group", "shrink_group")
JOIN, LEAVE = "init_process_group", "destroy_process_group"
JOINING = (JOIN, *MAKES_GROUP)
GROUP_CALLS = (*JOINING, LEAVE)
SOME_RANKS = "some ranks"  # the group of a call that not every rank needs to make
OWN_WORLD = "own world of rank"  # in the name of a group whose ranks are unknown

DDP = "DDP"  # the owner of calls that it makes by itself
DDP_CALLS = {"backward", "DistributedDataParallel"}  # within them DDP makes its own collectives
WAIT_FOR_BUCKETS = "wait for buckets"  # the name of the span in which backward only waits
NEXT_BATCH = "next batch"  # the name of the span in which `steps` fetches a batch
