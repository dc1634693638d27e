#!/usr/bin/env bash
# Start the ranks of this node. The same line on every node, but for NODE_RANK:
#
#   NODE_RANK=0 MASTER_ADDR=node-a bash torchrun_two_nodes.sh --device cuda --steps 500 --out runs/two --resume
#   NODE_RANK=1 MASTER_ADDR=node-a bash torchrun_two_nodes.sh --device cuda --steps 500 --out runs/two --resume
#
# The folder of --out has to be on a file system that all nodes share: rank 0 writes, all read.
set -euo pipefail

: "${NODE_RANK:?is 0 on the node that MASTER_ADDR names, and 1 on the other}"
: "${MASTER_ADDR:?is the name or address of node 0, the same on all nodes}"
: "${MASTER_PORT:=29400}"     # a port of node 0 that is free, and open to the other nodes
: "${NNODES:=2}"              # 2:4 would go on with two of four nodes
: "${NPROC_PER_NODE:=gpu}"    # a rank for each GPU; a number where there are none
: "${RUN_ID:=ddp}"            # the same on all nodes, another for each run at this port
: "${MAX_RESTARTS:=3}"        # how often all ranks may start again when one has failed
: "${SCRIPT:=$(dirname "${BASH_SOURCE[0]}")/../train_ddp_torchrun.py}"

# Node 0 keeps the store in which the nodes find each other; torchrun would guess by MASTER_ADDR who
# does. It also gives the nodes numbers of its own, by their names: rank 0 may be on node 1. So the
# nodes must reach each other on any port, each by the name that it calls itself, or by LOCAL_ADDR.
if ((NODE_RANK == 0)); then is_host=1; else is_host=0; fi

# A store for each start. In the shared one of torch 2.13, ranks that start again may find the
# addresses of those that died, and try to connect to them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes="$NNODES" --nproc_per_node="$NPROC_PER_NODE" --max_restarts="$MAX_RESTARTS" \
    --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv_id="$RUN_ID" \
    --rdzv_conf="is_host=$is_host,read_timeout=300" ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"} \
    "$SCRIPT" "$@"
