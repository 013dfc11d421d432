"""From images and captions to a LoRA file, in the order in which the modules are used.

    folder      a folder as people have it   -> Dataset of Examples (dataset, caption_sources, masks, images)
    split       Examples                     -> to train on, and held out
    doctor      Dataset                      -> what is odd about its pictures and captions
    buckets     their sizes                  -> one size a resolution, nothing dropped
    wording, augmentation                    -> the texts and variants an Example may come with
    cache       Dataset + Encoder            -> CachedDataset: latents, masks and text on disk
    batches     (seed, number)               -> Batch
    presets     purpose, family, pictures    -> a Plan: every number that the user left at 0 (plan_notes)
    families    the model's family           -> which layers, which noise levels
    targets     networks + patterns          -> which layers, with which rank
    kinds       a layer + rank               -> what is trained of it: LoRA, DoRA, LoHa, LoKr, OFT
    lora        all of these                 -> Adapters, kept outside the networks
    factors     a change of a weight         -> the same as a product of two small matrices
    warm_start  a change of a weight         -> adapters that begin with it
    frozen      a layer of the base model    -> the same layer, leaving its weight alone
    memory      what is free                 -> the plan by which a step fits
    attach      Adapters + network           -> an adapted network, for the length of one step
    embeddings  trigger words                -> new words, as ComfyUI and LoRA files hold them
    timesteps   (seed, step)                 -> noise levels
    noise       (seed, step)                 -> noisy latents, target
    losses      an answer + its target       -> the error, and what it counts
    objective   a Batch + all of these       -> what the network is asked, and the loss of its answer
    schedule, optimizer, ema                 -> learning rate of a step, the step itself, a running average
    loop        all of the above             -> Steps; `train()` is the function to read first
    endurance   Steps                        -> Steps, though training went wrong, memory ran out, or it was paused
    spoiling    losses, now and before       -> whether training has spoilt the network
    validation  held-out pictures            -> loss at fixed noise and fixed noise levels
    recording   Steps                        -> Steps and checkpoints, each written and measured
    identity    the settings of two runs     -> whether they are the same training, and what differs (differences)
    checkpoint  a LoRA file                  -> what is known about it
    run         checkpoints                  -> a record on disk, a state to resume from (state, metrics)
    lora_file   weights                      -> a .safetensors file every loader reads
    description a run                        -> what a file says about itself
    curve       losses                       -> the trend, without noise levels, and in words
    run_report  a run                        -> one page about it
    lora_series a folder of LoRA files       -> checkpoints, whoever trained them (lora_content)
    scores      losses of files and base     -> how much better each file is
    picking     scores                       -> which checkpoint, and why (score_chart draws both)
    signals     embeddings, weights          -> likeness, copies, variety, bleed, captions that mislead

Nothing here knows ComfyUI: it hands in a `Denoiser` (loop.py) and an `Encoder` (cache.py).
"""
