#!/bin/bash
# A vLLM server that `g2r train` with `rollout.vllm.mode servers` samples with (docs/rollouts.md). Stays in the foreground.
#
#   tools/vllm_server.sh /models/Qwen3-8B --port 8000 --dtype bfloat16 --max-model-len 3072
#
# The model's directory, then any options of vLLM's. It listens on loopback: whoever reaches it can replace its weights and call
# its workers, with an --api-key too. PYTHON: an interpreter with vLLM (python).

if [ $# = 0 ]; then echo "vllm_server.sh: give the model's directory, then options of vLLM" >&2; exit 2; fi
MODEL=$(realpath "$1") PYTHON=${PYTHON:-python}
shift
cd "$(dirname "$0")/.." || exit 2   # the workers import g2r_megatron
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1   # the first opens /collective_rpc and /reset_prefix_cache
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    export TORCH_COMPILE_DISABLE=1 VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    set -- --enforce-eager --no-enable-chunked-prefill "$@"   # parts of prompts: vLLM's seeded sampling cannot on a CPU
fi
# Not `vllm serve`: vLLM's CPU build has no such command that starts.
exec "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$MODEL" --host 127.0.0.1 --generation-config vllm \
    --worker-extension-cls g2r_megatron.rollout.vllm.receiver.WeightReceiver --enable-scale-out \
    --skip-tokenizer-init --logprobs-mode processed_logprobs "$@"
