# The boot-sector guest: a BIOS boots it, and it checks its own RAM.
#
# It fills `page_count` pages from 1 MiB upwards with a pattern that is a function of `seed`, the
# page's index and a generation, and then repeats for ever: sum all of them, print
#
#     pass N sum XXXXXXXX
#
# on COM1, rewrite every tenth page with generation N, and rest for `pause_ticks` timer ticks. The
# sums are therefore known beforehand: `testing/src/guest/boot_sector.rs` computes them too, and
# describes the pattern. A wrong, missing or exchanged page changes the sum of the next line.
#
# The first sector runs in real mode, loads the eight sectors behind it and enters 32-bit protected
# mode with flat segments and no paging. Interrupts are enabled only while it rests.
#
# Assembled by `cargo xtask setup` with `as --32`, linked at 0x7c00 to a flat binary.

        .set    RAM_START, 0x100000
        .set    WORDS_PER_PAGE, 1024
        .set    COM1, 0x3f8
        .set    SUM_MULTIPLIER, 0x9e3779b1

        .text
        .globl  _start
        .code16
_start:
        cli
        cld
        ljmp    $0, $1f
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp

        movw    $disk_address_packet, %si       # the BIOS left its drive number in %dl
        movb    $0x42, %ah                      # extended read
        int     $0x13
        jc      disk_error

        inb     $0x92, %al                      # address line 20 on, no reset
        orb     $2, %al
        andb    $0xfe, %al
        outb    %al, $0x92

        cli
        lgdt    gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $0x08, $protected

disk_error:
        movw    $COM1, %dx
        movb    $'!', %al
        outb    %al, %dx
2:      hlt
        jmp     2b

        .balign 4
disk_address_packet:
        .byte   16, 0
        .word   8                               # sectors
        .word   0x7e00, 0                       # offset and segment to load to
        .quad   1                               # first sector

        .balign 8
gdt:
        .quad   0
        .quad   0x00cf9a000000ffff              # 0x08: code, 4 GiB
        .quad   0x00cf92000000ffff              # 0x10: data, 4 GiB
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .org    510
        .word   0xaa55

# The parameter block: the harness writes it into its copy of the image.
        .org    512
        .ascii  "VMFGUEST"
seed:           .long 1
page_count:     .long 0
data_share:     .long 128                       # of 256 pages
repeated_share: .long 26                        # of 256 pages
pause_ticks:    .long 0                         # of 1/18.2 s

        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7c00, %esp
        call    set_up_timer
        movw    $(COM1 + 3), %dx                # 8 data bits, no parity, 1 stop bit
        movb    $3, %al
        outb    %al, %dx

        movl    $0, generation
        xorl    %ebx, %ebx
fill_next:
        cmpl    page_count, %ebx
        jae     passes
        call    write_page
        incl    %ebx
        jmp     fill_next

passes:
        incl    pass
        call    sum_pages
        call    print_pass
        call    change_pages
        call    rest
        jmp     passes

# Writes page %ebx as it is in `generation`. Keeps %ebx.
write_page:
        movl    %ebx, %edi
        shll    $12, %edi
        addl    $RAM_START, %edi

        imull   $0x9e3779b1, %ebx, %eax
        xorl    seed, %eax
        imull   $0x85ebca6b, generation, %edx
        xorl    %edx, %eax
        movl    %eax, %edx
        shrl    $16, %edx
        xorl    %edx, %eax
        imull   $0x7feb352d, %eax, %eax
        movl    %eax, %edx
        shrl    $15, %edx
        xorl    %edx, %eax
        imull   $0x846ca68b, %eax, %eax
        movl    %eax, %edx
        shrl    $16, %edx
        xorl    %edx, %eax

        movl    $WORDS_PER_PAGE, %ecx
        movzbl  %al, %edx
        subl    data_share, %edx
        jb      write_data
        subl    repeated_share, %edx
        jb      write_repeated
        xorl    %eax, %eax
        rep stosl
        ret
write_repeated:
        movl    seed, %eax
        orl     $1, %eax
        rep stosl
        ret
write_data:
        imull   $1664525, %eax, %eax
        addl    $1013904223, %eax
        movl    %eax, (%edi)
        addl    $4, %edi
        decl    %ecx
        jnz     write_data
        ret

# Sums all pages into %eax.
sum_pages:
        movl    $RAM_START, %esi
        xorl    %eax, %eax
        xorl    %ebx, %ebx
sum_next:
        cmpl    page_count, %ebx
        jae     sum_done
        xorl    %ebx, %eax
        roll    $5, %eax
        imull   $SUM_MULTIPLIER, %eax, %eax
        movl    $(WORDS_PER_PAGE / 4), %ecx
sum_words:
        .irp    displacement, 0, 4, 8, 12
        xorl    \displacement(%esi), %eax
        roll    $5, %eax
        imull   $SUM_MULTIPLIER, %eax, %eax
        .endr
        addl    $16, %esi
        decl    %ecx
        jnz     sum_words
        incl    %ebx
        jmp     sum_next
sum_done:
        ret

# Rewrites the pages whose index is `pass` modulo 10, with generation `pass`.
change_pages:
        movl    pass, %eax
        movl    %eax, generation
        xorl    %edx, %edx
        movl    $10, %ecx
        divl    %ecx
        movl    %edx, %ebx
change_next:
        cmpl    page_count, %ebx
        jae     change_done
        call    write_page
        addl    $10, %ebx
        jmp     change_next
change_done:
        ret

# Halts until `pause_ticks` timer interrupts have come.
rest:
        movl    $0, ticks
rest_next:
        movl    ticks, %eax
        cmpl    pause_ticks, %eax
        jae     rest_done
        sti
        hlt
        cli
        jmp     rest_next
rest_done:
        ret

# Prints the line of this pass; %eax is the sum.
print_pass:
        pushl   %eax
        movl    $text_pass, %esi
        call    print_text
        movl    pass, %eax
        movl    $10, %ecx
        movl    $1, %edi
        call    print_number
        movl    $text_sum, %esi
        call    print_text
        popl    %eax
        movl    $16, %ecx
        movl    $8, %edi
        call    print_number
        movb    $'\n', %al
        jmp     print_byte

# Prints the zero-terminated text at %esi.
print_text:
        lodsb
        testb   %al, %al
        jz      print_text_done
        call    print_byte
        jmp     print_text
print_text_done:
        ret

# Prints %eax in base %ecx with at least %edi digits.
print_number:
        xorl    %ebx, %ebx
digit_next:
        xorl    %edx, %edx
        divl    %ecx
        pushl   %edx
        incl    %ebx
        cmpl    %edi, %ebx
        jb      digit_next
        testl   %eax, %eax
        jnz     digit_next
digit_print:
        popl    %edx
        movb    digits(%edx), %al
        call    print_byte
        decl    %ebx
        jnz     digit_print
        ret

# Prints the byte in %al when the port is ready for it.
print_byte:
        pushl   %edx
        pushl   %eax
        movw    $(COM1 + 5), %dx
byte_wait:
        inb     %dx, %al
        testb   $0x20, %al
        jz      byte_wait
        popl    %eax
        movw    $COM1, %dx
        outb    %al, %dx
        popl    %edx
        ret

# Sends the timer, 18.2 times a second, to vector 0x20; every other interrupt stays masked.
set_up_timer:
        lidt    idt_pointer
        movl    $pic_setup, %esi
        xorl    %edx, %edx
pic_next:
        movb    (%esi), %dl
        testb   %dl, %dl
        jz      pic_done
        movb    1(%esi), %al
        outb    %al, %dx
        addl    $2, %esi
        jmp     pic_next
pic_done:
        ret

tick:
        pushl   %eax
        incl    ticks
        movb    $0x20, %al
        outb    %al, $0x20
        popl    %eax
        iret

        .balign 4
pass:           .long 0
generation:     .long 0
ticks:          .long 0

pic_setup:                                      # port and byte, up to port 0
        .byte   0x20, 0x11, 0xa0, 0x11          # start: a command with four words
        .byte   0x21, 0x20, 0xa1, 0x28          # vectors
        .byte   0x21, 0x04, 0xa1, 0x02          # the second PIC is on line 2 of the first
        .byte   0x21, 0x01, 0xa1, 0x01          # 8086 mode
        .byte   0x21, 0xfe, 0xa1, 0xff          # all masked except the timer
        .byte   0x43, 0x34, 0x40, 0x00, 0x40, 0x00
        .byte   0

text_pass:      .asciz "pass "
text_sum:       .asciz " sum "
digits:         .ascii "0123456789abcdef"

        .balign 8
idt:
        .fill   32, 8, 0
        .rept   16
        .word   tick, 0x08, 0x8e00, 0
        .endr
idt_pointer:
        .word   idt_pointer - idt - 1
        .long   idt

        .org    512 * 9
