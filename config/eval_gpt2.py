# Loss of the published GPT-2 weights (124M) on OpenWebText; writes nothing.
#   python train.py config/eval_gpt2.py

batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = 'gpt2'
