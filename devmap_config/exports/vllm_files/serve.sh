#!/bin/sh
# sh serve.sh plan.env node.N.env [further flags of `vllm serve`]    serves, together with the other hosts
# sh serve.sh --print plan.env node.N.env [...]                      prints the arguments, as a shell reads them
# sh serve.sh --health plan.env node.N.env                           asks the engine for one token
# PYTHON and VLLM name other commands than `python3` and `vllm`.
set -eu
mode=serve
case ${1:-} in --print | --health) mode=${1#--}; shift ;; esac
[ $# -ge 2 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
absolute() { # of a name that is none of an option, even where it begins with `-`
    case $1 in /*) ;; *) set -- "./$1" ;; esac
    printf '%s/%s\n' "$(cd "$(dirname "$1")" && pwd)" "$(basename "$1")"
}
here=$(dirname "$(absolute "$0")")
plan=$(absolute "$1")
node=$(absolute "$2")
shift 2
unset VLLM_PP_LAYER_PARTITION # one that is left set is taken for this plan's
. "$plan"
. "$node"

set -- "$MODEL" --served-model-name="$SERVED_NAME" --dtype "$DTYPE" --kv-cache-dtype "$KV_CACHE_DTYPE" \
    --tensor-parallel-size "$TENSOR_PARALLEL_SIZE" --pipeline-parallel-size "$PIPELINE_PARALLEL_SIZE" \
    --distributed-executor-backend mp --device-ids "$DEVICE_IDS" \
    --max-model-len "$MAX_MODEL_LEN" --max-num-seqs "$MAX_NUM_SEQS" \
    --max-num-batched-tokens "$MAX_NUM_BATCHED_TOKENS" --block-size "$BLOCK_SIZE" \
    --kv-cache-memory-bytes "$KV_CACHE_MEMORY_BYTES" "$@"
[ -z "$REVISION" ] || set -- "$@" --revision "$REVISION"
if [ "$NODES" -gt 1 ]; then
    set -- "$@" --nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
fi
if [ "$NODE_RANK" -eq 0 ]; then
    set -- "$@" --host "$API_HOST" --port "$API_PORT"
else
    set -- "$@" --headless
fi
case $mode in
print)
    for argument; do
        case $argument in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf '%s\n' "$argument" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/" ;;
        *) printf '%s\n' "$argument" ;;
        esac
    done
    exit
    ;;
health) exec "${PYTHON:-python3}" "$here/cluster.py" health "$API_HOST" "$API_PORT" "$SERVED_NAME" "$HEALTH_SECONDS" ;;
esac

[ "$PIPELINE_PARALLEL_SIZE" -eq 1 ] || export VLLM_PP_LAYER_PARTITION
export VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS VLLM_NO_USAGE_STATS=1
if [ "$NODES" -gt 1 ]; then
    # Without the interface, gloo takes what the host's own name resolves to, often 127.0.0.1, and waits for ever.
    [ -n "$INTERFACE" ] || INTERFACE=$(ip -o addr show to "$VLLM_HOST_IP" | awk '{ print $2; exit }')
    [ -n "$INTERFACE" ] || { echo "no network interface of this host has the address $VLLM_HOST_IP" >&2; exit 1; }
    export VLLM_HOST_IP GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
fi
exec "${PYTHON:-python3}" "$here/cluster.py" run "$plan" "$NODE_RANK" "$NODES" "$MASTER_ADDR" "$JOIN_PORT" \
    "$JOIN_SECONDS" "$RANKS" "$KIND" -- "${VLLM:-vllm}" serve "$@"
