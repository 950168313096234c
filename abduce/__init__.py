from abduce import dist
from abduce.errors import *
from abduce.ppl.language import deterministic, factor, param, sample, scaled, scope, while_loop
from abduce.ppl.masked import masked
from abduce.ppl.model import Model, model
from abduce.ppl.selection import sel
from abduce.ppl.trace import Trace
from abduce.ppl.reparam import bijection, noncentered
from abduce.ppl.transforms import condition, do, log_density, propose, reparam, with_prior
from abduce.inference import init
from abduce.inference.algorithm import Algorithm
from abduce.inference.mcmc.algorithms import hmc, nuts
from abduce.inference.posterior import Posterior
from abduce.inference.stored import load
