;; The arithmetic of browser.html in WebAssembly with SIMD: nearly all of the time is spent here.
;; Every address is in bytes and every number a float32; a v128 holds four of them. The weights are
;; (out, in), as in nn.Linear. `python docs/browser.py kernels` assembles it into the page; the
;; same functions stand there in plain JavaScript, for browsers without SIMD.
;; Reads and writes may go up to three numbers beyond the end of a buffer.
(module
  (import "page" "memory" (memory 1))

  ;; Dot products of x (n) with four rows of a matrix, whose distance is `stride`.
  (func $dot4 (param $x i32) (param $row0 i32) (param $stride i32) (param $n i32) (result v128)
    (local $row1 i32) (local $row2 i32) (local $row3 i32) (local $end i32)
    (local $sum0 v128) (local $sum1 v128) (local $sum2 v128) (local $sum3 v128) (local $four v128)
    (local.set $row1 (i32.add (local.get $row0) (local.get $stride)))
    (local.set $row2 (i32.add (local.get $row1) (local.get $stride)))
    (local.set $row3 (i32.add (local.get $row2) (local.get $stride)))
    (local.set $end
        (i32.add (local.get $x) (i32.shl (i32.and (local.get $n) (i32.const -4)) (i32.const 2))))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $x) (local.get $end)))
        (local.set $four (v128.load (local.get $x)))
        (local.set $sum0
            (f32x4.add (local.get $sum0)
            (f32x4.mul (local.get $four) (v128.load (local.get $row0)))))
        (local.set $sum1
            (f32x4.add (local.get $sum1)
            (f32x4.mul (local.get $four) (v128.load (local.get $row1)))))
        (local.set $sum2
            (f32x4.add (local.get $sum2)
            (f32x4.mul (local.get $four) (v128.load (local.get $row2)))))
        (local.set $sum3
            (f32x4.add (local.get $sum3)
            (f32x4.mul (local.get $four) (v128.load (local.get $row3)))))
        (local.set $x (i32.add (local.get $x) (i32.const 16)))
        (local.set $row0 (i32.add (local.get $row0) (i32.const 16)))
        (local.set $row1 (i32.add (local.get $row1) (i32.const 16)))
        (local.set $row2 (i32.add (local.get $row2) (i32.const 16)))
        (local.set $row3 (i32.add (local.get $row3) (i32.const 16)))
        (br $next)))
    (call $tail (call $sum4 (local.get $sum0) (local.get $sum1) (local.get $sum2) (local.get $sum3))
      (local.get $x) (local.get $row0) (local.get $row1) (local.get $row2) (local.get $row3)
      (i32.and (local.get $n) (i32.const 3))))

  ;; (sum of a's lanes, sum of b's, sum of c's, sum of d's)
  (func $sum4 (param $a v128) (param $b v128) (param $c v128) (param $d v128) (result v128)
    (local $ab v128) (local $cd v128)
    (local.set $ab (f32x4.add ;; (a0 + a2, b0 + b2, a1 + a3, b1 + b3)
      (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $a) (local.get $b))
      (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $a) (local.get $b))))
    (local.set $cd (f32x4.add
      (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $c) (local.get $d))
      (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $c) (local.get $d))))
    (f32x4.add
      (i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 (local.get $ab) (local.get $cd))
      (i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31 (local.get $ab)
          (local.get $cd))))

  ;; Sums, plus the last n products of x with four rows: those beyond a multiple of four.
  (func $tail (param $sums v128) (param $x i32) (param $row0 i32) (param $row1 i32)
      (param $row2 i32)
      (param $row3 i32) (param $n i32) (result v128)
    (local $column v128)
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $n)))
        (local.set $column (v128.load32_zero (local.get $row0)))
        (local.set $column (v128.load32_lane 1 (local.get $row1) (local.get $column)))
        (local.set $column (v128.load32_lane 2 (local.get $row2) (local.get $column)))
        (local.set $column (v128.load32_lane 3 (local.get $row3) (local.get $column)))
        (local.set $sums (f32x4.add (local.get $sums)
          (f32x4.mul (local.get $column) (v128.load32_splat (local.get $x)))))
        (local.set $x (i32.add (local.get $x) (i32.const 4)))
        (local.set $row0 (i32.add (local.get $row0) (i32.const 4)))
        (local.set $row1 (i32.add (local.get $row1) (i32.const 4)))
        (local.set $row2 (i32.add (local.get $row2) (i32.const 4)))
        (local.set $row3 (i32.add (local.get $row3) (i32.const 4)))
        (local.set $n (i32.sub (local.get $n) (i32.const 1)))
        (br $next)))
    (local.get $sums))

  ;; $dot4 for two positions, x0 and x1 (n) each: a number of the matrix that is loaded serves both.
  (func $dot4x2 (param $x0 i32) (param $x1 i32) (param $row0 i32) (param $stride i32) (param $n i32)
      (result v128 v128)
    (local $row1 i32) (local $row2 i32) (local $row3 i32) (local $end i32) (local $rest i32)
    (local $a0 v128) (local $a1 v128) (local $a2 v128) (local $a3 v128) (local $four0 v128)
    (local $b0 v128) (local $b1 v128) (local $b2 v128) (local $b3 v128) (local $four1 v128)
    (local $weights v128)
    (local.set $row1 (i32.add (local.get $row0) (local.get $stride)))
    (local.set $row2 (i32.add (local.get $row1) (local.get $stride)))
    (local.set $row3 (i32.add (local.get $row2) (local.get $stride)))
    (local.set $end
        (i32.add (local.get $x0) (i32.shl (i32.and (local.get $n) (i32.const -4)) (i32.const 2))))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $x0) (local.get $end)))
        (local.set $four0 (v128.load (local.get $x0)))
        (local.set $four1 (v128.load (local.get $x1)))
        (local.set $weights (v128.load (local.get $row0)))
        (local.set $a0
            (f32x4.add (local.get $a0) (f32x4.mul (local.get $four0) (local.get $weights))))
        (local.set $b0
            (f32x4.add (local.get $b0) (f32x4.mul (local.get $four1) (local.get $weights))))
        (local.set $weights (v128.load (local.get $row1)))
        (local.set $a1
            (f32x4.add (local.get $a1) (f32x4.mul (local.get $four0) (local.get $weights))))
        (local.set $b1
            (f32x4.add (local.get $b1) (f32x4.mul (local.get $four1) (local.get $weights))))
        (local.set $weights (v128.load (local.get $row2)))
        (local.set $a2
            (f32x4.add (local.get $a2) (f32x4.mul (local.get $four0) (local.get $weights))))
        (local.set $b2
            (f32x4.add (local.get $b2) (f32x4.mul (local.get $four1) (local.get $weights))))
        (local.set $weights (v128.load (local.get $row3)))
        (local.set $a3
            (f32x4.add (local.get $a3) (f32x4.mul (local.get $four0) (local.get $weights))))
        (local.set $b3
            (f32x4.add (local.get $b3) (f32x4.mul (local.get $four1) (local.get $weights))))
        (local.set $x0 (i32.add (local.get $x0) (i32.const 16)))
        (local.set $x1 (i32.add (local.get $x1) (i32.const 16)))
        (local.set $row0 (i32.add (local.get $row0) (i32.const 16)))
        (local.set $row1 (i32.add (local.get $row1) (i32.const 16)))
        (local.set $row2 (i32.add (local.get $row2) (i32.const 16)))
        (local.set $row3 (i32.add (local.get $row3) (i32.const 16)))
        (br $next)))
    (local.set $rest (i32.and (local.get $n) (i32.const 3)))
    (call $tail (call $sum4 (local.get $a0) (local.get $a1) (local.get $a2) (local.get $a3))
      (local.get $x0) (local.get $row0) (local.get $row1) (local.get $row2) (local.get $row3)
          (local.get $rest))
    (call $tail (call $sum4 (local.get $b0) (local.get $b1) (local.get $b2) (local.get $b3))
      (local.get $x1) (local.get $row0) (local.get $row1) (local.get $row2) (local.get $row3)
          (local.get $rest)))

  ;; out (T, nOut) = x (T, nIn) times weight (nOut, nIn) transposed, plus bias (nOut).
  ;; Four rows of the weight at a time, for all positions; the last four may overlap others.
  (func (export "linear") (param $x i32) (param $weight i32) (param $bias i32) (param $out i32)
      (param $T i32) (param $nIn i32) (param $nOut i32)
    (local $o i32) (local $t i32) (local $last i32) (local $rows i32) (local $xt i32)
        (local $to i32)
    (local $stride i32) (local $width i32) (local $biases v128) (local $first v128)
        (local $second v128)
    (local.set $stride (i32.shl (local.get $nIn) (i32.const 2)))
    (local.set $width (i32.shl (local.get $nOut) (i32.const 2)))
    (local.set $last (i32.sub (local.get $nOut) (i32.const 4)))
    (loop $nextRows
      (if (i32.gt_s (local.get $o) (local.get $last)) (then (local.set $o (local.get $last))))
      (if (i32.lt_s (local.get $o) (i32.const 0)) (then (local.set $o (i32.const 0))))
      (local.set $rows (i32.add (local.get $weight) (i32.mul (local.get $o) (local.get $stride))))
      (local.set $biases
          (v128.load (i32.add (local.get $bias) (i32.shl (local.get $o) (i32.const 2)))))
      (local.set $to (i32.add (local.get $out) (i32.shl (local.get $o) (i32.const 2))))
      (local.set $xt (local.get $x))
      (local.set $t (i32.const 0))
      (block $done
        (loop $nextPositions
          (br_if $done (i32.gt_s (i32.add (local.get $t) (i32.const 2)) (local.get $T)))
          (call $dot4x2 (local.get $xt) (i32.add (local.get $xt) (local.get $stride))
              (local.get $rows)
            (local.get $stride) (local.get $nIn))
          (local.set $second)
          (local.set $first)
          (v128.store (local.get $to) (f32x4.add (local.get $biases) (local.get $first)))
          (local.set $to (i32.add (local.get $to) (local.get $width)))
          (v128.store (local.get $to) (f32x4.add (local.get $biases) (local.get $second)))
          (local.set $to (i32.add (local.get $to) (local.get $width)))
          (local.set $xt (i32.add (local.get $xt) (i32.shl (local.get $stride) (i32.const 1))))
          (local.set $t (i32.add (local.get $t) (i32.const 2)))
          (br $nextPositions)))
      (if (i32.lt_s (local.get $t) (local.get $T))
        (then (v128.store (local.get $to) (f32x4.add (local.get $biases)
          (call $dot4 (local.get $xt) (local.get $rows) (local.get $stride) (local.get $nIn))))))
      (local.set $o (i32.add (local.get $o) (i32.const 4)))
      (br_if $nextRows (i32.lt_s (local.get $o) (local.get $nOut)))))

  ;; e to the x, for four numbers: 2^n times a polynomial of the rest (Moshier's Cephes, expf).
  (func $exp (param $x v128) (result v128)
    (local $n v128) (local $y v128)
    (local.set $x (f32x4.min (f32x4.max (local.get $x) (v128.const f32x4 -87 -87 -87 -87))
      (v128.const f32x4 88 88 88 88)))
    (local.set $n (f32x4.nearest (f32x4.mul (local.get $x)
      (v128.const f32x4 1.44269504 1.44269504 1.44269504 1.44269504))))
    (local.set $x (f32x4.sub (local.get $x) (f32x4.mul (local.get $n) ;; ln 2 in two parts
      (v128.const f32x4 0.693359375 0.693359375 0.693359375 0.693359375))))
    (local.set $x (f32x4.add (local.get $x) (f32x4.mul (local.get $n)
      (v128.const f32x4 2.12194440e-4 2.12194440e-4 2.12194440e-4 2.12194440e-4))))
    (local.set $y
        (v128.const f32x4 1.9875691500e-4 1.9875691500e-4 1.9875691500e-4 1.9875691500e-4))
    (local.set $y (f32x4.add (f32x4.mul (local.get $y) (local.get $x))
      (v128.const f32x4 1.3981999507e-3 1.3981999507e-3 1.3981999507e-3 1.3981999507e-3)))
    (local.set $y (f32x4.add (f32x4.mul (local.get $y) (local.get $x))
      (v128.const f32x4 8.3334519073e-3 8.3334519073e-3 8.3334519073e-3 8.3334519073e-3)))
    (local.set $y (f32x4.add (f32x4.mul (local.get $y) (local.get $x))
      (v128.const f32x4 4.1665795894e-2 4.1665795894e-2 4.1665795894e-2 4.1665795894e-2)))
    (local.set $y (f32x4.add (f32x4.mul (local.get $y) (local.get $x))
      (v128.const f32x4 1.6666665459e-1 1.6666665459e-1 1.6666665459e-1 1.6666665459e-1)))
    (local.set $y (f32x4.add (f32x4.mul (local.get $y) (local.get $x))
      (v128.const f32x4 0.5 0.5 0.5 0.5)))
    (local.set $y (f32x4.add (f32x4.mul (f32x4.mul (local.get $y) (local.get $x)) (local.get $x))
      (f32x4.add (local.get $x) (v128.const f32x4 1 1 1 1))))
    (f32x4.mul (local.get $y) (i32x4.shl ;; n becomes the exponent of a float32
      (i32x4.add (i32x4.trunc_sat_f32x4_s (local.get $n)) (v128.const i32x4 127 127 127 127))
      (i32.const 23))))

  ;; GELU in its tanh form, in place: x / (1 + exp(-2 z)), z = sqrt(2 / pi) * (x + 0.044715 x^3).
  (func (export "gelu") (param $x i32) (param $n i32)
    (local $end i32) (local $four v128)
    (local.set $end (i32.add (local.get $x) (i32.shl (local.get $n) (i32.const 2))))
    (loop $next
      (local.set $four (v128.load (local.get $x)))
      (v128.store (local.get $x) (f32x4.div (local.get $four) (f32x4.add (v128.const f32x4 1 1 1 1)
        (call $exp (f32x4.mul (f32x4.mul (local.get $four)
            (v128.const f32x4 -1.5957691216 -1.5957691216 -1.5957691216 -1.5957691216))
          (f32x4.add (v128.const f32x4 1 1 1 1)
              (f32x4.mul (f32x4.mul (local.get $four) (local.get $four))
            (v128.const f32x4 0.044715 0.044715 0.044715 0.044715))))))))
      (local.set $x (i32.add (local.get $x) (i32.const 16)))
      (br_if $next (i32.lt_u (local.get $x) (local.get $end)))))

  ;; Causal self-attention of one query q (H * D) to n keys; the values stand H * D numbers after
  ;; them, and the rows of keys and values, 3 * H * D numbers each, follow one another.
  ;; Weights: scores (H, room), room >= n rounded up to a multiple of four. Mix: out (H * D).
  (func (export "attention") (param $q i32) (param $keys i32) (param $scores i32) (param $out i32)
      (param $n i32) (param $H i32) (param $D i32) (param $room i32)
    (local $stride i32) (local $values i32) (local $h i32) (local $s i32) (local $at i32)
        (local $end i32)
    (local $max v128) (local $sum v128) (local $scale v128) (local $four v128) (local $width i32)
    (local.set $width (i32.shl (local.get $D) (i32.const 2)))
    (local.set $stride (i32.mul (i32.mul (local.get $width) (local.get $H)) (i32.const 3)))
    (local.set $values (i32.add (local.get $keys) (i32.mul (local.get $width) (local.get $H))))
    (loop $nextHead
      (local.set $end (i32.add (local.get $scores) (i32.shl (local.get $n) (i32.const 2))))

      ;; scores = q k / sqrt(D); -infinity beyond the n-th
      (local.set $scale
          (f32x4.splat (f32.div (f32.const 1) (f32.sqrt (f32.convert_i32_u (local.get $D))))))
      (local.set $at (local.get $scores))
      (local.set $s (local.get $keys))
      (loop $next
        (v128.store (local.get $at) (f32x4.mul (local.get $scale)
          (call $dot4 (local.get $q) (local.get $s) (local.get $stride) (local.get $D))))
        (local.set $s (i32.add (local.get $s) (i32.shl (local.get $stride) (i32.const 2))))
        (local.set $at (i32.add (local.get $at) (i32.const 16)))
        (br_if $next (i32.lt_u (local.get $at) (local.get $end))))
      (v128.store (local.get $end) (v128.const f32x4 -inf -inf -inf -inf))

      ;; softmax
      (local.set $max (v128.const f32x4 -inf -inf -inf -inf))
      (local.set $at (local.get $scores))
      (loop $next
        (local.set $max (f32x4.max (local.get $max) (v128.load (local.get $at))))
        (local.set $at (i32.add (local.get $at) (i32.const 16)))
        (br_if $next (i32.lt_u (local.get $at) (local.get $end))))
      (local.set $max (f32x4.max (local.get $max)
        (i8x16.shuffle 8 9 10 11 12 13 14 15 0 1 2 3 4 5 6 7 (local.get $max) (local.get $max))))
      (local.set $max (f32x4.max (local.get $max)
        (i8x16.shuffle 4 5 6 7 0 1 2 3 12 13 14 15 8 9 10 11 (local.get $max) (local.get $max))))
      (local.set $sum (v128.const f32x4 0 0 0 0))
      (local.set $at (local.get $scores))
      (loop $next
        (local.set $four (call $exp (f32x4.sub (v128.load (local.get $at)) (local.get $max))))
        (v128.store (local.get $at) (local.get $four))
        (local.set $sum (f32x4.add (local.get $sum) (local.get $four)))
        (local.set $at (i32.add (local.get $at) (i32.const 16)))
        (br_if $next (i32.lt_u (local.get $at) (local.get $end))))
      (local.set $sum
          (call $sum4 (local.get $sum) (local.get $sum) (local.get $sum) (local.get $sum)))
      (local.set $at (local.get $scores))
      (loop $next
        (v128.store (local.get $at) (f32x4.div (v128.load (local.get $at)) (local.get $sum)))
        (local.set $at (i32.add (local.get $at) (i32.const 16)))
        (br_if $next (i32.lt_u (local.get $at) (local.get $end))))

      ;; out = sum of the values times their weights
      (call $mix (local.get $scores) (local.get $end) (local.get $values) (local.get $stride)
        (local.get $out) (local.get $D))
      (local.set $q (i32.add (local.get $q) (local.get $width)))
      (local.set $keys (i32.add (local.get $keys) (local.get $width)))
      (local.set $values (i32.add (local.get $values) (local.get $width)))
      (local.set $out (i32.add (local.get $out) (local.get $width)))
      (local.set $scores (i32.add (local.get $scores) (i32.shl (local.get $room) (i32.const 2))))
      (local.set $h (i32.add (local.get $h) (i32.const 1)))
      (br_if $nextHead (i32.lt_u (local.get $h) (local.get $H)))))

  ;; out (D) = sum of the rows of values, each times its weight; four rows at a time.
  (func $mix (param $weight i32) (param $end i32) (param $row0 i32) (param $stride i32)
      (param $out i32)
      (param $D i32)
    (local $row1 i32) (local $row2 i32) (local $row3 i32) (local $i i32) (local $whole i32)
        (local $size i32)
    (local $w0 v128) (local $w1 v128) (local $w2 v128) (local $w3 v128)
    (local.set $size (i32.shl (local.get $D) (i32.const 2)))
    (local.set $whole (i32.and (local.get $size) (i32.const -16)))
    (memory.fill (local.get $out) (i32.const 0) (local.get $size))
    (loop $nextRows
      (local.set $row1 (i32.add (local.get $row0) (local.get $stride)))
      (local.set $row2 (i32.add (local.get $row1) (local.get $stride)))
      (local.set $row3 (i32.add (local.get $row2) (local.get $stride)))
      (local.set $w0 (v128.load32_splat (local.get $weight)))
      (local.set $w1 (v128.load32_splat offset=4 (local.get $weight)))
      (local.set $w2 (v128.load32_splat offset=8 (local.get $weight)))
      (local.set $w3 (v128.load32_splat offset=12 (local.get $weight)))
      (local.set $i (i32.const 0))
      (block $done
        (loop $next
          (br_if $done (i32.ge_u (local.get $i) (local.get $whole)))
          (v128.store (i32.add (local.get $out) (local.get $i)) (f32x4.add
            (v128.load (i32.add (local.get $out) (local.get $i))) (f32x4.add
              (f32x4.add
                (f32x4.mul (local.get $w0) (v128.load (i32.add (local.get $row0) (local.get $i))))
                (f32x4.mul (local.get $w1) (v128.load (i32.add (local.get $row1) (local.get $i)))))
              (f32x4.add
                (f32x4.mul (local.get $w2) (v128.load (i32.add (local.get $row2) (local.get $i))))
                (f32x4.mul (local.get $w3)
                    (v128.load (i32.add (local.get $row3) (local.get $i))))))))
          (local.set $i (i32.add (local.get $i) (i32.const 16)))
          (br $next)))
      (block $done ;; channels beyond a multiple of four, one by one: the next belong to others
        (loop $next
          (br_if $done (i32.ge_u (local.get $i) (local.get $size)))
          (v128.store32_lane 0 (i32.add (local.get $out) (local.get $i)) (f32x4.add
            (v128.load32_zero (i32.add (local.get $out) (local.get $i))) (f32x4.add
              (f32x4.add
                (f32x4.mul (local.get $w0)
                    (v128.load32_zero (i32.add (local.get $row0) (local.get $i))))
                (f32x4.mul (local.get $w1)
                    (v128.load32_zero (i32.add (local.get $row1) (local.get $i)))))
              (f32x4.add
                (f32x4.mul (local.get $w2)
                    (v128.load32_zero (i32.add (local.get $row2) (local.get $i))))
                (f32x4.mul (local.get $w3)
                    (v128.load32_zero (i32.add (local.get $row3) (local.get $i))))))))
          (local.set $i (i32.add (local.get $i) (i32.const 4)))
          (br $next)))
      (local.set $row0 (i32.add (local.get $row3) (local.get $stride)))
      (local.set $weight (i32.add (local.get $weight) (i32.const 16)))
      (br_if $nextRows (i32.lt_u (local.get $weight) (local.get $end)))))
)
