"""The facts that are read off a module, on one that is written here."""

from hlo import Hlo, facts, host_synchronizations, size

MODULE = """\
HloModule jit_step, is_scheduled=true

%fused_computation (p.1: f32[8,4]) -> (f32[], f32[8,4]) {
  %p.1 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %t = (f32[], f32[8,4]{1,0}) tuple(%p.1, %p.1)
}

%plain (a: (f32[])) -> (f32[]) {
  ROOT %a = (f32[]) parameter(0)
}

%scaled (b: (f32[8,4], f32[])) -> (f32[]) {
  %b = (f32[8,4]{1,0}, f32[]) parameter(0)
  %of_b = f32[8,4]{1,0} get-tuple-element(%b), index=0
  %again = f32[] fusion(%of_b), kind=kLoop, calls=%fused_computation, backend_config={"estimated_cycles":"30"}
  %sum.2 = f32[] all-reduce(%again), channel_id=2, to_apply=%add
  ROOT %u = (f32[]) tuple(%sum.2)
}

%body (c: (f32[8,4])) -> (f32[8,4]) {
  %c = (f32[8,4]{1,0}) parameter(0)
  %of_c = f32[8,4]{1,0} get-tuple-element(%c), index=0
  %in_loop = f32[8,4]{1,0} fusion(%of_c), kind=kLoop, calls=%fused_computation, backend_config={"estimated_cycles":"5"}
  ROOT %v = (f32[8,4]{1,0}) tuple(%in_loop)
}

ENTRY %main.1 (x: f32[8,4], w: bf16[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %w = bf16[8,4]{1,0} parameter(1)
  %start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%start)
  %part = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:4]}
  %first = (f32[], f32[8,4]{1,0}) fusion(%done, %w, /*index=2*/%done), kind=kOutput, calls=%fused_computation, backend_config={"estimated_cycles":"100"}
  %unknown = f32[] fusion(%w), kind=kLoop, calls=%fused_computation, backend_config={"estimated_cycles":"9223372036854775807"}
  %room = f32[2,4]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %reduce = f32[] all-reduce-start(%unknown), channel_id=1, to_apply=%add
  %reduced = f32[] all-reduce-done(%reduce)
  %pred = pred[] compare(%reduced, %reduced), direction=EQ
  %if = (f32[]) conditional(%pred, %x, %x), true_computation=%plain, false_computation=%scaled
  %loop = (f32[8,4]{1,0}) while(%x), condition=%check, body=%body
  ROOT %out = f32[8,4]{1,0} copy(%x)
}

%check (d: (f32[8,4])) -> pred[] {
  ROOT %e = pred[] compare(%d, %d), direction=EQ
}
"""  # noqa: E501
LOOP = "000: kCommandBuffer [x]\n    001: kConditional [x]\n002: kWhile [x]\n  body:\n{body}"


def test_what_always_runs_and_what_a_branch_holds_are_kept_apart():
    of = facts(MODULE, temporary=7)
    assert (of.kernels, of.fusions, of.copies) == (4, 3, 1)
    assert (of.cycles, of.branch_cycles) == (100 + 5, 30)  # one is not known
    assert (of.conditionals, of.loops, of.temporary) == (1, 1, 7)
    assert (of.collectives, of.collective_bytes) == ({"all-reduce": 1}, 4)
    assert (of.branch_collectives, of.branch_collective_bytes) == ({"all-reduce": 1}, 4)


def test_bytes_are_those_of_hbm_and_each_operand_counts_once():
    copies = 128 + 32  # x to VMEM, and two of its rows
    first = 64 + 4 + 128  # w is read and both results are written
    unknown, loop, last = 64 + 4, 2 * 128, 2 * 128
    assert facts(MODULE).bytes == copies + first + unknown + loop + last


def test_a_fusion_is_named_with_the_types_of_its_results():
    hlo = Hlo(MODULE)
    fusions = [one for one in hlo.computations[hlo.entry] if one.opcode == "fusion"]
    assert fusions[0].type == "(f32[], f32[8,4]{1,0})"
    assert fusions[0].operands == ("done", "w", "done")


def test_the_size_of_a_type():
    assert size("(bf16[2,3]{1,0}, pred[4], s32[])") == 12 + 4 + 4
    assert size("f32[2]{0:T(128)S(1)}") == 0
    assert size("f32[2]{0:T(128)S(1)}", hbm=False) == 8
    assert size("f8e4m3fn[8]{0}") == 8
    assert size("s4[8]{0}") == 4


def test_the_host_waits_for_what_is_not_in_a_cuda_graph():
    known = MODULE.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    within = LOOP.format(body="    000: kCommandBuffer [x]\n        003: kConditional [x]\n")
    assert host_synchronizations(within, known) == 0
    assert host_synchronizations(within, MODULE) == 1  # the loop asks after each iteration
    alone = LOOP.format(
        body="    003: kConditional [x]\n      false_branch:\n        004: kConditional"
    )
    assert host_synchronizations(alone, known) == 1  # what a branch holds is not always run
