"""Virtual-time simulator of replicas, nodes and routers: the product's balancer against the best alternatives.

`engine` moves requests through replicas, `nodes` draws what happens to the machines, `workload` what users send,
`arms` hold one routing policy each, `scenario` names the experiments, `run` measures one of them. `what_if` compares
the arms on a user's own trace (`own_trace`) and machines (`own_machines`): `shadecast simulate`.
"""
