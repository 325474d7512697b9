"""The static check must notice what it is there for; `make static` runs it on the real kernels."""

import pytest

pytest.importorskip("triton")

from benchmarks import nvcc_check, sass, static_check
from benchmarks.static_cases import Case

# A loop of 8 instructions that loads and stores 128 bits, a spill after it, and a loop around both that stores 16 bits.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                          /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                /* 0x0000000402047981 */
        /*0020*/                   FFMA R5, R22, R59, R45 ;                        /* 0x0000000402047981 */
        /*0030*/                   MUFU.EX2 R8, R5 ;                               /* 0x0000000402047981 */
        /*0040*/               @P1 FMUL R8, R8, R8 ;                               /* 0x0000000402047981 */
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R8 ;                /* 0x0000000402047981 */
        /*0060*/                   IADD3 R2, R2, 0x1, RZ ;                         /* 0x0000000402047981 */
        /*0070*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;               /* 0x0000000402047981 */
        /*0080*/               @P0 BRA 0x10 ;                                      /* 0x0000000402047981 */
        /*0090*/                   STL [R1], R8 ;                                  /* 0x0000000402047981 */
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R8 ;                /* 0x0000000402047981 */
        /*00b0*/              @!P2 BRA 0x0 ;                                       /* 0x0000000402047981 */
        /*00c0*/                   EXIT ;                                          /* 0x0000000402047981 */
        /*00d0*/                   BRA 0xd0 ;                                      /* 0x0000000402047981 */
        /*00e0*/                   NOP ;                                           /* 0x0000000402047981 */
"""
USAGE = " Function kernel:\n  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:552 TEXTURE:0"


@pytest.fixture
def code():
    return sass.parse(SASS, USAGE)


def test_parse(code):
    assert (code.registers, code.stack_bytes, code.spills, code.instructions) == (40, 8, 1, 14)
    loop = code.main_loop(storing=True)
    assert loop == sass.Loop(8, 1, 0, 1, 0, 1)
    assert loop.per_element(2) == 1.0
    assert loop.per_element(4) == 2.0
    assert code.main_loop(storing=False) is None


def _wrong(code, case, sm=90):
    return static_check._check(sm, case, code)[2]


def test_spills_fail(code):
    assert any("spills" in x for x in _wrong(code, Case("any", lambda: None)))


def test_budget_fails_on_one_architecture_only(code):
    case = Case("any", lambda: None, 2, (True,), 0.9)
    assert any("exceed 0.9" in x for x in _wrong(code, case))
    assert not any("exceed" in x for x in _wrong(code, case, sm=80))
    assert not any("exceed" in x for x in _wrong(code, Case("any", lambda: None, 2, (True,), 1.0)))


def test_a_row_that_is_not_streamed_wide_fails(code):
    case = Case("any", lambda: None, 2, (False, True), 9.0)
    assert any("no loop streams" in x for x in _wrong(code, case))
    narrow = sass.parse(SASS.replace("STG.E.128", "STG.E.U16"), USAGE)
    assert any(
        "no loop streams" in x for x in _wrong(narrow, Case("any", lambda: None, 2, (True,), 9.0))
    )
    mixed = sass.parse(
        SASS.replace("IADD3 R2, R2, 0x1, RZ", "LDG.E.U16 R9, desc[UR4][R2.64]"), USAGE
    )
    assert any(
        "less than 128" in x for x in _wrong(mixed, Case("any", lambda: None, 2, (True,), 9.0))
    )


def test_no_nvcc_is_said_loudly(capsys):
    assert static_check.check_cuda(None) == []
    assert "SKIPPED" in capsys.readouterr().out


def test_spills_of_cuda_kernels_fail(capsys):
    class Log:
        def kernels(self):
            return [nvcc_check.CudaKernel("a.cu", "k", 90, 255, 16, 0, 0)]

    assert static_check.check_cuda([Log()]) == ["sm_90 a.cu k: spills"]
    assert "255" in capsys.readouterr().out


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        static_check.main([])
    assert "no machine code" in capsys.readouterr().err
