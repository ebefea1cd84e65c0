# From the state that a Multiboot loader leaves (32 bits, no paging) to long mode with SSE, AVX and
# AVX-512.
.set MAGIC, 0x1badb002
.set FLAGS, 0
.section .multiboot, "a"
.align 4
.long MAGIC, FLAGS, -(MAGIC + FLAGS)

.bss
.align 4096
level4: .skip 4096
level3: .skip 4096
level2: .skip 4096
.skip 1048576
stack:

.data
.align 8
descriptors: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
descriptors_end:
pointer: .word descriptors_end - descriptors - 1
.long descriptors

.section .note.GNU-stack, "", @progbits

.text
.code32
.globl start
start:
    cli
    cld
    mov $stack, %esp
    # The first gigabyte, in pages of two megabytes, at its own addresses.
    movl $level3 + 3, level4
    movl $level2 + 3, level3
    xor %ecx, %ecx
1:  mov %ecx, %eax
    shl $21, %eax
    or $0x83, %eax
    mov %eax, level2(,%ecx,8)
    inc %ecx
    cmp $512, %ecx
    jb 1b
    mov $level4, %eax
    mov %eax, %cr3
    # CR4: PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
    mov $0x40620, %eax
    mov %eax, %cr4
    # EFER: long mode.
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    # CR0: paging, native errors, monitoring, protection; no emulation of the FPU.
    mov $0x80000023, %eax
    mov %eax, %cr0
    lgdt pointer
    ljmp $8, $long
.code64
long:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    # XCR0: x87, SSE, AVX, and the three parts of AVX-512 that the processor has.
    mov $13, %eax
    xor %ecx, %ecx
    cpuid
    and $0xe7, %eax
    xor %ecx, %ecx
    xor %edx, %edx
    xsetbv
    mov $stack, %rsp
    call check

# What the compiler expects of a C library.
.globl memcpy, memmove, memset, memcmp, bcmp
memmove:
    mov %rdi, %rax
    sub %rsi, %rax
    cmp %rdx, %rax
    jae memcpy
    mov %rdi, %rax
    mov %rdx, %rcx
    lea -1(%rdi,%rdx), %rdi
    lea -1(%rsi,%rdx), %rsi
    std
    rep movsb
    cld
    ret
memcpy:
    mov %rdi, %rax
    mov %rdx, %rcx
    rep movsb
    ret
memset:
    mov %rdi, %r8
    mov %esi, %eax
    mov %rdx, %rcx
    rep stosb
    mov %r8, %rax
    ret
memcmp:
bcmp:
    mov %rdx, %rcx
    xor %eax, %eax
    test %rcx, %rcx
    jz 2f
    repe cmpsb
    movzbl -1(%rdi), %eax
    movzbl -1(%rsi), %ecx
    sub %ecx, %eax
2:  ret
