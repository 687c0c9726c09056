// The tile registers in plain C++, for tests where no CPU has them: same class, same results as the SDM's pseudocode.
// A shape that the hardware would fault on traps. Inside the unit's namespace.
class Tiles {
  public:
    explicit Tiles(const TileConfig& config) : config_(config) {
        require(config.palette == 1 && config.start_row == 0);
        for (int t = 0; t < 16; t++) require(config.rows[t] <= (t < 8 ? 16 : 0) && config.bytes[t] <= (t < 8 ? 64 : 0));
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int T>
    void zero() {
        require(config_.rows[T] > 0);
        std::memset(data_[T], 0, sizeof data_[T]);
    }
    template <int T>
    void load(const void* p, size_t stride) {
        zero<T>();
        for (size_t r = 0; r < config_.rows[T]; r++)
            std::memcpy(data_[T][r], static_cast<const uint8_t*>(p) + r * stride, config_.bytes[T]);
    }
    template <int T>
    void store(void* p, size_t stride) {
        require(config_.rows[T] > 0);
        for (size_t r = 0; r < config_.rows[T]; r++)
            std::memcpy(static_cast<uint8_t*>(p) + r * stride, data_[T][r], config_.bytes[T]);
    }
    template <int C, int A, int B>
    void dot_su() {
        dot<C, A, B, uint8_t>();
    }
    template <int C, int A, int B>
    void dot_ss() {
        dot<C, A, B, int8_t>();
    }
    // The even and the odd members of the pairs are summed apart over all of A's columns, then added to C; subnormal
    // inputs and results are zero.
    template <int C, int A, int B>
    void dot_bf() {
        check_shapes<C, A, B>();
        for (int m = 0; m < config_.rows[C]; m++)
            for (int n = 0; n < config_.bytes[C] / 4; n++) {
                float even = 0.f, odd = 0.f, c;
                for (int k = 0; k < config_.bytes[A] / 4; k++) {
                    even = flush(__builtin_fmaf(half<A>(m, 2 * k), half<B>(k, 2 * n), even));
                    odd = flush(__builtin_fmaf(half<A>(m, 2 * k + 1), half<B>(k, 2 * n + 1), odd));
                }
                std::memcpy(&c, data_[C][m] + 4 * n, 4);
                c = flush(flush(c) + flush(even + odd));
                std::memcpy(data_[C][m] + 4 * n, &c, 4);
            }
    }

  private:
    static void require(bool ok) {
        if (!ok) __builtin_trap();
    }
    template <int C, int A, int B>
    void check_shapes() const {
        static_assert(C != A && C != B && A != B, "the instruction faults on equal tiles");
        require(config_.rows[C] > 0 && config_.rows[A] == config_.rows[C] && config_.bytes[B] == config_.bytes[C] &&
                config_.rows[B] * 4 == config_.bytes[A]);
    }
    template <int C, int A, int B, class Weight>
    void dot() {
        check_shapes<C, A, B>();
        for (int m = 0; m < config_.rows[C]; m++) {
            int32_t sum[16];
            std::memcpy(sum, data_[C][m], 64);
            for (int k = 0; k < config_.bytes[A]; k++) {
                const int a = static_cast<int8_t>(data_[A][m][k]);
                for (int n = 0; n < config_.bytes[C] / 4; n++)
                    sum[n] += a * static_cast<Weight>(data_[B][k / 4][4 * n + k % 4]);
            }
            std::memcpy(data_[C][m], sum, config_.bytes[C]);
        }
    }
    template <int T>
    float half(int row, int i) const {
        uint16_t b;
        std::memcpy(&b, data_[T][row] + 2 * i, 2);
        return flush(bf16_to_float(b));
    }
    static float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.f, x) : x; }

    TileConfig config_;
    uint8_t data_[8][16][64] = {};
};
