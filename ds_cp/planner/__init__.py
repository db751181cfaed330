"""`ds-cp plan`: which (ulysses, ring, data, ZeRO, offload, tiles) a model of these sizes can be trained with on these GPUs, and
what each takes. Pure arithmetic, without torch; only `read` looks at a model.

    read     a model by name or path, without weights        -> Shape
    machine  GPUs, links: named, or given                     -> Machine
    search   every legal choice, each with
             memory   bytes by part, the worst moment of a step
             traffic  bytes a step, what of it leaves a host
             times    seconds by part
    render   the table, JSON, a ds_config

What the figures are worth is in docs/planner.md.
"""
